"""The method: traces, the coprocessor, its objective. One step, from main.

How a batch's `tokens` [B, S] get from the command to the loss, a line a call:

   1  main.main                        the command line, and errors as one line
   2  train.train                      mesh, data, model, state, restore, loop
   3  pipeline.Batches.iterate         tokens, documents [B, S] of one step
   4  step.make_step: step             jitted: loss, gradient, update
   5  step.add_points                  points p [B, M], and lateness
   6    point_sampling.sample_points   where latents stand
   7  step.summed                      in micro-batches
   8  step.make_step: loss             the trainable tree made whole
   9  objective.coprocessor_loss       the three passes
  10    rounds.layout_traces           rows, targets and weights of M traces
  11      traces.layout_traces
  12    objective.context_pass         1: the frozen decoder's cache
  13      transformer.run
  14    objective.traces_nll
  15      objective.traces_states
  16        coprocessor.hidden_states  2: latents z [B, M, N, D]
  17        objective.decoder_states   3: [z | ahead tokens] over the cache
  18          transformer.run
  19      objective.rows_nll           nll [B, M, A] of the ahead tokens
  20        cross_entropy.token_nll

`transformer.run` is all layers over rows; its attention is model/attention.py,
whose context part kernels/ compute in tiles. Where latents are keys and values,
kv_latents.py does 16 and 17; of several rounds, rounds.py. What may be added to
the objective is in terms.py, which then takes the place of 9. The kinds of
coprocessor are the table in kinds.py. docs/method.md tells the same with
pictures.
"""
