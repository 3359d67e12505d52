"""Photos on SMB shares: encrypted, with the credentials of one share each, and loud about what is wrong."""
