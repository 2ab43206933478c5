"""The service: answers questions about images, keeps the deployed students, says how it is."""
