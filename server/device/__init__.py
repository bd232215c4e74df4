"""What computes: runners, backends, graphs, and the stage that prepares. The room that needs torch."""
