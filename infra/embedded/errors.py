"""What can go wrong while starting things on this machine. Each message says what to do next."""


class EmbeddedError(Exception):
    """Kafka, the model or a role could not be started or stopped; the message is meant for the person at the terminal."""
