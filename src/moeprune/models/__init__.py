"""Everything that knows transformers and safetensors: reading, walking, editing, opening."""
