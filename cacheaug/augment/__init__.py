"""The paper: traces -> mask -> three passes -> loss."""
