"""Imported by the fork server of the resume tests, so that its children find imports, patterns and modules ready."""

import gc

from peft import get_peft_model

from tests.support import tiny

get_peft_model(tiny.base_model(), tiny.lora_config())  # compiles a thousand patterns on its first call
gc.collect()
gc.freeze()  # children collect their own garbage only
