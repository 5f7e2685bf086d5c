"""The checker's parts. They read the topics by themselves: nothing here uses Foldflow's codec, filter or fold."""
