"""From messages to a prompt: the model's chat template, made safe. Pure: no thread, no engine, no clock."""
