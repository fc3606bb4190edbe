"""From token to text: UTF-8 hold-back and stop strings. Pure: no thread, no engine, no clock."""
