"""The HTTP server: OpenAI's API on one AsyncEngine. Imported only when it is used; needs the extra [server].

Read in this order: app.py (what is served, and what each request passes through), completions.py (one endpoint from
body to answer), stream.py (how answers travel), run.py (signals, drain, exit status).
"""
