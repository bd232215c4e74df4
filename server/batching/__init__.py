"""Queues, batches and the choice of `r`. Pure: it imports neither HTTP nor torch, and its clock is an argument.

`Batcher` (batcher.py) takes requests and feeds one device, batch by batch. `Queues` (queues.py) chooses the next jobs:
those of the fullest key, unless a job has waited `batch_timeout_s` or nears its deadline, so that a rare `r` does not
starve. An idle device takes what waits; there is no timer. By the estimates of `Speed`, a batch takes at most 30 % of
its first job's time, and a job that would be late is given up before it is computed. Outliers do not move the
estimates, and an estimate that refuses work is tried again when it is a second old. `Pipeline` (pipeline.py) takes
batches through two stages: one is prepared while the one before computes, and a full batch is handed on before the
stage is free. `Speed` learns the pace of the slower stage.

Under `r=auto` a lone image waits without a key. When it leads a batch, `policy.turn` takes the first rung of the ladder
that keeps up: arrivals take at most 95 % of its capacity, and all waiting images are done in 40 % of their remaining
time. The dial goes up at once. It comes down when a lower rung has been enough (90 %, 30 %) for a second. Images whose
bounds allow the rung join the batch, or fill up a batch of an explicit `r`. The reason for each image's `r` is recorded
when it is chosen. Several images of a request share one choice, made when they arrive. The cost of a batch of n is a +
b n for each rung: from the curve, or computed from the timed r=0, times a factor that follows the batches that run.

While the device is idle, a share of the images answered with r > 0 is computed again at r=0 (drift.py). This live
agreement is compared with the curve's. `LocalEngine` (engine.py) connects all of it to a device by two threads, and
resolves model, `r`, version and `auto` once for each request. The engine gives up when its device fails at the simplest
work, or works on one batch for five minutes. The supervisor then starts another.
"""
