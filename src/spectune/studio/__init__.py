"""spectune as a page in the browser.

serve: the command `spectune studio`.
app: the web application, made of the routers in pages/.
security: what every request must satisfy; login: the password.
places: the folders that pages may read and write.
settings: folders and theme; workspace: everything that the pages share.
rendering: templates, static files and error pages.
assistant/: a child process that imports torch and replies to questions of the pages.
jobs/: the queue of commands that run as processes of their own.
pages/: one module per page.

The server never imports torch. Only the assistant and the jobs do.
"""
