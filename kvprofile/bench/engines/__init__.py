"""What answers the requests of a leg: a vLLM server that is started for it, or a provider that runs somewhere else.

Both speak OpenAI's protocol, so one client measures both. Local engines run in a process of their own, fresh for each
leg.
"""
