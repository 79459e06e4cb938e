"""What any part may use and none owns: files, HTTP, processes."""
