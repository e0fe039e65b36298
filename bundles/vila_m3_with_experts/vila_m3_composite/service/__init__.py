"""The composite as an OpenAI-compatible service with a chat page; every answer comes from the agent loop.

To follow one request: ``app.py`` (route), ``chat.py`` (messages to session, agent, events), ``vlm_queue.py`` and
``experts.py`` (who computes, when).
"""
