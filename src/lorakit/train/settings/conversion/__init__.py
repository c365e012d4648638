"""Convert settings files of other tools (Axolotl, LLaMA-Factory, mlx-lm, PEFT) to settings of `lorakit train`."""
