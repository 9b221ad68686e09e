"""One function for each command, with its requests and its reports."""
