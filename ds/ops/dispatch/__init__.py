"""How an op is defined, checked, called and differentiated."""
