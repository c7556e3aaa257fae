"""Speed, memory and quality of fira_hf beside its peers."""
