"""The parts of a trace's page: events packed for the browser, HTML blocks, and the scripts and styles they need."""
