"""Ideas around the method, each with its command; none imports another."""
