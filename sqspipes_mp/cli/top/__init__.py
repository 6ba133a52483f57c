"""The view of a running engine: plain text, or live on Textual. It imports no broker and none of the user's code."""
