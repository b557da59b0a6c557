"""Which hooks a model carries."""

TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hooks_of(hf):
    return {
        (name, table): [(key, id(hook)) for key, hook in getattr(module, table).items()]
        for name, module in hf.named_modules()
        for table in TABLES
    }
