"""A local HTTP endpoint in front of a personal model, as the OpenAI API has it."""
