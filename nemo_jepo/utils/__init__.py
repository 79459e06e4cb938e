"""What any part may use and none owns: files, network, HTTP, processes, exit codes."""
