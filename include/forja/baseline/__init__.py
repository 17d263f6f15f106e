"""The security baseline of a cluster's tenants: what is installed, and the proof that it refuses.

``manifests`` fills k8s/baseline for each tenant, ``plan`` compares it with the cluster and changes what differs, ``probes`` says what a
proof is, ``admission`` and ``network`` ask the cluster, ``report`` puts their answers together.
"""
