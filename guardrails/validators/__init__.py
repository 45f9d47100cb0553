"""The validators that come with newel, each a module with `Options` and `build`; `guardrails.catalog` names them."""
