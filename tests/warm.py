"""What a command line takes seconds to import, for the process that `tests.forked` forks."""

import peft  # noqa: F401
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401

import rankwise.auto
import rankwise.cli
import rankwise.exporting
import rankwise.reporting
import rankwise.study  # noqa: F401
