"""Where in a metric's name the policy update stands: for whoever makes, reads or draws them. The whole table is
`algorithm/metric_table.py`. No torch here.
"""

UPDATE = "ppo_actor/update"
APPROXIMATION = f"{UPDATE}/compute_logp"
