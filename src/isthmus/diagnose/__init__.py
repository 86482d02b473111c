"""What ails a network, measured on real pictures."""
