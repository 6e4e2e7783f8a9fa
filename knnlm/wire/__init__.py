"""Arrays and messages as bytes and as JSON, in one place: services and clients share it and cannot differ.

arrays.py has what an array looks like on the wire, protos.py and jsonable.py turn the messages of knnlm/messages.py
into protobuf messages and JSON-able dicts and back. Whatever is malformed raises InvalidRequest that names the field.
Limits on how much may be sent belong to those who listen.
"""

from knnlm.wire.arrays import array_from_json, array_from_tensor, array_to_json, array_to_tensor

__all__ = ["array_from_json", "array_from_tensor", "array_to_json", "array_to_tensor"]
