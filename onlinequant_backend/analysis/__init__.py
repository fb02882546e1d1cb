"""One traced graph: how Dynamo traces it, what identifies it, and all that stays the same while it is used."""
