"""Amazon SQS behind the port."""

from sqspipes_mp.brokers.sqs.broker import SQS as SQS
