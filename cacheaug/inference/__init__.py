"""Generation from plain and augmented caches.

From text to text:

  lm.LM.generate                    prompts as text
    context.read                    the prompts' cache
    session.Session                 decodes, and knows when latents are due
      engine.insert_latents
        engine.compute_latents      the latents
        engine.write_latents        where they enter the cache
      engine.decode                 new tokens
    completion.Completions          new tokens as text, up to a stop

A gate (gates.py) may decline latents; sampling.py draws the tokens.
"""
