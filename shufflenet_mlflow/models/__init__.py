"""The networks of the ShuffleNet series, and what describes one."""
