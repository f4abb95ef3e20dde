"""A federated run over machines that keep their data: the simulator's plan, methods, server and ledger over messages.

`server.py` runs the rounds and asks nodes to train; `node.py` answers. What carries their packets is an `Exchange`:
Flower's SuperLink and SuperNodes (`server_app.py`, `client_app.py` and `messenger.py`, the only modules that know
Flower), or a test. `allowed.py` says which settings of a server's recipe a node obeys.
"""
