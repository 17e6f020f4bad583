"""What the back ends of foreign solvers share; each back end itself imports its library when it runs."""
