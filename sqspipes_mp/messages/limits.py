"""SQS's limits, which hold on every broker. Pure."""

#: Most bytes of one message, attributes included, and of one batch (Amazon SQS API Reference, SendMessageBatch).
MAX_BYTES = 1_048_576
#: What an output may have: the dead-letter attribute must fit in beside the body later.
MAX_BODY = MAX_BYTES - 16_384
#: The String attribute that says why a message is in a dead-letter queue.
FAILURE_ATTRIBUTE = "sqspipes_mp.failure"
#: Longest visibility timeout, counted from the receive (Amazon SQS API Reference, ChangeMessageVisibility).
MAX_VISIBILITY = 43_200.0
