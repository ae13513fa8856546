"""`pact-fast serve MODEL`: a small rollout server, token ids in, token ids and log-probs out.

thread.py   the thread that owns the in-process engine (rollout/in_process)
weights.py  new weights from a folder, checked before anything is changed
protocol.py what a request may ask and what an answer holds
server.py   HTTP, standard library; access, errors
"""
