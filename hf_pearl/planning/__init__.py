"""What would go where, before a weight is loaded: devices, what models take, who gets which."""
