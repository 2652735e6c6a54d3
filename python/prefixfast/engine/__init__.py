"""Generation: requests with any prefixes, packed together, over one frozen base."""
