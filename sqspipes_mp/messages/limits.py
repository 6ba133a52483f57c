"""SQS's limits on a message, which hold on every broker. Pure."""

#: Most bytes of one message, attributes included, and of one batch (Amazon SQS API Reference, SendMessageBatch).
MAX_BYTES = 1_048_576
#: Most bytes of an output's body: the failure attribute of a dead letter must fit beside it.
MAX_BODY = MAX_BYTES - 16_384
#: Name of the String attribute with the reason of a dead letter.
FAILURE_ATTRIBUTE = "sqspipes_mp.failure"
#: Longest visibility timeout, seconds from the receive (Amazon SQS API Reference, ChangeMessageVisibility).
MAX_VISIBILITY = 43_200.0
