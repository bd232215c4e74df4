"""Queues, batches and the choice of `r`. Pure: it knows neither HTTP nor torch, and its clock is an argument.

`Batcher` (batcher.py) takes requests of some payloads and feeds one device, batch by batch; `Queues` (queues.py) says
which jobs go next: those of the fullest key, unless a job has waited `batch_timeout_s` or nears its deadline, so that
no rare `r` starves. It never waits out a timer: an idle device takes what is there. A batch takes 30 % of its first
job's time at most, by what `Speed` knows; what cannot be done in time is given up before it is computed. Outliers do
not move what it knows, and an estimate that refuses work is tried again when it is a second old. `Pipeline`
(pipeline.py) takes batches through their stages: one is prepared while the one before computes, and full ones are
handed on before the stage is free; the slower stage is the pace that `Speed` learns.

Under `r=auto` a lone image waits without a key. When it leads a batch, `policy.turn` goes through the ladder for the
first rung that keeps up: arrivals take at most 95 % of its capacity, and everything that waits is done in 40 % of its
time. The dial goes up at once, and comes down when a lower rung has done with less (90 %, 30 %) for a second. Images
whose bounds allow it join, or fill up a batch of an explicit `r`. Why an image got its `r` is recorded at that moment.
Several images of a request share one choice, made when they come. Costs are a + b n a rung, from the curve or by
arithmetic from the timed r=0, times a factor that follows the batches that run.

Of the images answered with r > 0 a share is computed again at r=0 while the device has nothing else to do (drift.py):
live agreement, which is compared with the curve's. `LocalEngine` (engine.py) ties all of it to a device, by two
threads, and resolves model, `r`, version and `auto` of a request, once. It gives itself up when its device fails at
the simplest work or works on one batch for five minutes, so that the supervisor starts another.
"""
