"""What a training keeps in the folder of its artifact besides the tries, shared by all of them."""

CHECKPOINTS, METRICS, INCARNATIONS, HANGS = "checkpoints", "metrics", "incarnations", "hangs"
