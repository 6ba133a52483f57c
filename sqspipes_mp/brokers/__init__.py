"""Queue services: a folder each, behind the port in ``base``."""

from sqspipes_mp.brokers.sqlite import SQLite as SQLite
from sqspipes_mp.brokers.sqs import SQS as SQS
