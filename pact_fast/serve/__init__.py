"""`pact-fast serve MODEL`: a small rollout server, token ids in, token ids and log-probs out.

cache.py    keys and values of the rows in flight, and of prefixes that may come again
batcher.py  continuous batching: requests enter and leave the batch between any two tokens
weights.py  new weights from a folder, checked before anything is changed
protocol.py what a request may ask and what an answer holds
server.py   HTTP, standard library; access, errors
"""
