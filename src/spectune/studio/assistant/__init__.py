"""A child process that has torch in memory and replies to short questions of the pages.

client: the server's side: start it, ask, restart it after a crash.
questions: the table of questions.
__main__: the child: JSON lines on stdin and stdout.

A question is `{"id", "ask", "values", "roots"}`, a reply `{"id", "answer"}` or
`{"id", "error": {"what", "hint"}}`. The child's first line is `{"ready": true}`.
"""
