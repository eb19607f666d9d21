"""The bugs of the field, each put back into correct code, and what finds them."""
