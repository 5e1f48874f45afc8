"""The commands of `python -m flash_attention_jax`, one module each.

A command has `add_parser(subparsers)`, which declares its arguments and sets its `run`, and
`run(args) -> int`, which returns the exit status. `__main__` names the commands.
"""
