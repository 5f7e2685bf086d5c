from hypothesis import settings

# How long an example takes says what else the machine is doing; time is measured in `tests/bench`, by ratios.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
