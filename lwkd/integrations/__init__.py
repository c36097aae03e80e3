"""The wrapper in the form of other libraries; each module is imported only by who asks for it, and needs its library.

- :mod:`lwkd.integrations.lightning`: a Callback for Lightning's Trainer.
- :mod:`lwkd.integrations.transformers`: a TrainerCallback, and a Trainer with a teacher.

Accelerate needs no adapter: make the :class:`~lwkd.LayerwiseOptimizer` before ``accelerator.prepare``, or
:func:`~lwkd.attach` after it and ``accelerator.register_for_checkpointing(handle.rate_state)``.
"""
