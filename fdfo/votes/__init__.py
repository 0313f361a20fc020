"""What people chose in a run: how steadily, how far a scorer agrees, and the votes as a data set (`python -m fdfo.votes`)."""
