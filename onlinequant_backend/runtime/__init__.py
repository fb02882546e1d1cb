"""The callable that Dynamo gets: it observes, has layers selected, compiles, and then runs in 8 bit or in float."""
