"""One training run, from its configuration to its record.

config          the schema of scripts/train.py
assemble        configuration -> data, network, trainer and record, ready to start
run             the verb: fit, evaluate val once, draw the picture, close the record
network         the network with its views of an image and its classes, without Lightning
classifier      the network, its loss and its update rule as one LightningModule
master_weights  float32 master weights with a bfloat16 working copy, and the fused update
capture         the step as one CUDA graph
callbacks       checkpoints, watchdog, progress bar
metrics         metrics.csv, written and read
checkpoint      what a checkpoint holds, and loading it
record          run.json
compare         runs side by side
scoring         images -> log-probabilities -> errors with their intervals
probe           will this network leave the plateau at ln(classes)?
"""
